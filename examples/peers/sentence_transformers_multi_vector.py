"""The same by sentence-transformers 6.2.

python examples/peers/sentence_transformers_multi_vector.py MODEL TRIPLETS.jsonl OUT
"""

import sys

from datasets import load_dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorMultipleNegativesRankingLoss,
)

source, triplets, out = sys.argv[1:]
train_dataset = load_dataset("json", data_files=triplets, split="train")
model = MultiVectorEncoder(source)
args = MultiVectorEncoderTrainingArguments(
    output_dir=out, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-4, logging_steps=1
)
trainer = MultiVectorEncoderTrainer(
    model=model,
    args=args,
    train_dataset=train_dataset,
    loss=MultiVectorMultipleNegativesRankingLoss(model),
)
trainer.train()
model.save_pretrained(f"{out}/model")

row = train_dataset[0]
queries = model.encode_query([row["query"]])
passages = model.encode_document([row["positive"], row["negative"]])
print(model.similarity(queries, passages)[0].tolist())
