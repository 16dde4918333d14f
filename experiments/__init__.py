"""One command for each table and figure in `docs/ablation` and `docs/inside`. Not part of the wheel."""
