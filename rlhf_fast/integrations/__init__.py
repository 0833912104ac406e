"""The ops inside other people's trainers and loops."""
