"""Training: adapters on a frozen base model. Programs: ``train.sft``."""
