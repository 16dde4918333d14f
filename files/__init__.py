"""Files as training, evaluation and the demo read and write them."""
