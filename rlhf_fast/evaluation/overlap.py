"""What responses and references have in common, by the two packages whose numbers papers report."""

from collections.abc import Sequence
from importlib.util import find_spec

ROUGE = ("rouge1", "rouge2", "rougeL")


def overlap(responses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[str, float], list[str]]:
    """``bleu`` (0..100) and the F measures ``rouge1 rouge2 rougeL`` (0..1); and a sentence for each package not there.

    ``references`` has one or more texts for each response. BLEU is sacrebleu's of the corpus, with its tokenizer 13a;
    ROUGE is rouge-score's without a stemmer, the mean over the responses of the best reference.
    """
    figures, notes = {}, []
    if find_spec("sacrebleu") is None:
        notes.append("no BLEU: sacrebleu is not installed: pip install 'rlhf-fast[evaluate]'")
    else:
        import sacrebleu

        most = max(map(len, references))
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        figures["bleu"] = float(sacrebleu.corpus_bleu(list(responses), streams).score)
    if find_spec("rouge_score") is None:
        notes.append("no ROUGE: rouge-score is not installed: pip install 'rlhf-fast[evaluate]'")
    else:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        found = [scorer.score_multi(list(texts), said) for said, texts in zip(responses, references, strict=True)]
        figures |= {name: sum(each[name].fmeasure for each in found) / len(found) for name in ROUGE}
    return figures, notes
