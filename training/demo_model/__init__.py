"""Parts of the training recipe of `demo/model`, which `training.train_demo_model` runs."""
