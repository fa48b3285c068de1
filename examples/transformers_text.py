"""The Trainer of transformers, on text that is made on the spot: one callback watches the gradient.

pip install "gradmon[transformers]"; python examples/transformers_text.py; tensorboard --logdir runs
"""

import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from gradmon import every
from gradmon_integrations.callbacks.transformers import GradmonCallback

random.seed(0)
torch.manual_seed(0)


def sentence():
    """Letters that say what comes after them: a count, as in ``abcabc``, from a random start."""
    start, length = random.randrange(26), random.randint(2, 5)
    return [1 + (start + place % length) % 26 for place in range(32)]


rows = [{"input_ids": row, "labels": row} for row in (sentence() for _ in range(512))]
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=27, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
watch = GradmonCallback(schedule=every(10), run="text", sinks="tensorboard:runs/text")
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="runs/text-checkpoints",
        per_device_train_batch_size=32,
        num_train_epochs=4,
        learning_rate=3e-3,
        logging_steps=16,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=rows,
    callbacks=[watch],
)
trainer.train()

for name in ("loss", "grad_norm", "step_ratio", "noise_ratio"):
    reading = watch.monitor.readings[name]
    print(f"{name:12} {reading.value:10.4g}  at step {reading.step}")
