"""Reading and writing of files for training, evaluation and the demo."""
