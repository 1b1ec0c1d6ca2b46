"""ELECTRA-Small on IMDb: the worked example that this project started from, without its padding.

    python docs/worked_example.py google/electra-small-discriminator aclImdb MODEL

What it is, and why it is faster, stands in docs/worked_example.md.
"""

import sys

from electra_core import FinetuneSettings, choose_task
from electra_core.finetune import finetune
from electra_core.predict import evaluate, load

model, data, out = sys.argv[1:4]
task, _ = choose_task("imdb")
settings = FinetuneSettings(
    batch_size=8, epochs=3, optimizer="adamw", learning_rate=5e-5, layerwise_decay=1.0, warmup=0.0
)
finetune(model, task, f"{data}/train", None, out, settings)  # a tenth of train/ chooses the best epoch
print(f"Test Accuracy: {evaluate(load(out), f'{data}/test').metrics['accuracy']:.4f}")
