"""Late interaction from query, positive and negative, by PyLate 1.6, as its documentation has it.

python examples/peers/pylate_colbert.py MODEL TRIPLETS.jsonl OUT
"""

import sys

from datasets import load_dataset
from pylate import losses, models, scores, utils
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

source, triplets, out = sys.argv[1:]
train_dataset = load_dataset("json", data_files=triplets, split="train")
model = models.ColBERT(model_name_or_path=source)
args = SentenceTransformerTrainingArguments(
    output_dir=out, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-4, logging_steps=1
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=args,
    train_dataset=train_dataset,
    loss=losses.Contrastive(model=model),
    data_collator=utils.ColBERTCollator(model.tokenize),
)
trainer.train()
model.save_pretrained(f"{out}/model")

row = train_dataset[0]
queries = model.encode([row["query"]], is_query=True)
passages = model.encode([row["positive"], row["negative"]], is_query=False)
print([float(scores.colbert_scores(queries, passage[None])) for passage in passages])
