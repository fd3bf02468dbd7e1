"""Training: a resumable loop, adversarial training, pre-training and fine-tuning of Transformers."""
