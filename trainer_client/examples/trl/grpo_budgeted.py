"""GRPO with TRL on the demo's task."""

from clock import MAX_TOKENS, Curve, Setup, options, reward
from trl import GRPOConfig
from knapsack_trainer_client.integrations.trl import BudgetedGRPOTrainer as Trainer

chosen = options()
setup = Setup(chosen.seed, chosen.out.parent)
trainer = Trainer(
    model=setup.model,
    reward_funcs=reward,
    args=GRPOConfig(
        str(chosen.out),
        per_device_train_batch_size=1024,
        num_generations=8,
        max_completion_length=MAX_TOKENS,
        max_steps=chosen.steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        gradient_checkpointing=False,
        seed=chosen.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=setup.dataset,
    processing_class=setup.tokenizer,
    callbacks=[Curve(setup, chosen.out / "curve.json")],
)
trainer.train()
