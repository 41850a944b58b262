"""A Trainer that scores predicted spans as text."""

from transformers import Trainer


class SpanTrainer(Trainer):
    """Evaluates with the share of examples whose predicted text is exactly the answer.

    Args:
        examples: the raw rows of `eval_dataset`, with `context` and `answer`.
        offsets: for each of them, the first and last character of every token; None outside the context.
    """

    def __init__(self, *args, examples=None, offsets=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.examples, self.offsets = examples, offsets

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        output = self.predict(eval_dataset or self.eval_dataset, ignore_keys, metric_key_prefix)
        starts, ends = (logits.argmax(-1) for logits in output.predictions)
        spans = zip(self.examples, self.offsets, starts, ends, strict=True)
        hits = [_text(row["context"], offsets[start], offsets[end]) == row["answer"] for row, offsets, start, end in spans]
        metrics = {**output.metrics, f"{metric_key_prefix}_exact_match": sum(hits) / len(hits)}
        self.log(metrics)
        return metrics


def _text(context, first, last):
    return context[first[0] : last[1]] if first and last else ""
