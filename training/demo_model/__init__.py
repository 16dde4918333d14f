"""What the recipe of the model in `demo/model` consists of; `training.train_demo_model` runs it."""
