"""The bare model, forward and backward, on the batch's texts in groups of equal length."""

import sys
from collections import defaultdict

import torch
from transformers import AutoModel, AutoTokenizer

from erniesearch.models.backbone import resolve
from training_speed.material import batches_of, read_job
from training_speed.work import serve


def main(kind: str, job_file: str, attention: str) -> None:
    """Serve one kind."""
    job = read_job(job_file)
    path = resolve(job.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModel.from_pretrained(
        path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    ).to(device).train()  # fmt: skip
    if job.precision == "bf16":
        model.bfloat16()

    def tokens(rows: list[list[str]]) -> list[list[int]]:
        sizes = (job.max_query_length, job.max_passage_length)
        if kind == "cross_encoder":
            pairs = [(row[0], text) for row in rows for text in row[1:]]
            found = tokenizer(
                [query for query, _ in pairs], [text for _, text in pairs], truncation=True,
                max_length=sum(sizes),
            )["input_ids"]  # fmt: skip
            return list(found)
        found = tokenizer([r[0] for r in rows], truncation=True, max_length=sizes[0])["input_ids"]
        texts = [text for row in rows for text in row[1:]]
        return found + tokenizer(texts, truncation=True, max_length=sizes[1])["input_ids"]

    prepared = iter([tokens(batch) for batch in batches_of(job)])

    def step() -> None:
        by_length = defaultdict(list)
        for ids in next(prepared):
            by_length[len(ids)].append(ids)
        for group in by_length.values():
            states = model(input_ids=torch.tensor(group, device=device)).last_hidden_state
            states.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()

    serve(lambda: 0.0, step)


if __name__ == "__main__":
    main(*sys.argv[1:])
