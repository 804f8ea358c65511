"""Post-training: fine-tuning on conversations, and the tasks that chat models are measured by."""
