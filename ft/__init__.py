"""End-to-end fine-tuning: objectives, regularisers, schedules, weight averages and weight-space ensembles.

A trained model is written to a model folder (`ft.checkpoints.folder`), and encoded and evaluated like any other.
"""
