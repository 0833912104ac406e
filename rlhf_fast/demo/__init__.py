"""The main job in five minutes, without a download."""
