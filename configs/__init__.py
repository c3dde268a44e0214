"""The main job: a training script."""
