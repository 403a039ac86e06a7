"""End-to-end fine-tuning: objectives, regularisers, schedules, weight averages and weight-space ensembles.

A trained model leaves through a model folder (`ft.checkpoints.folder`), and is encoded and judged like any other.
"""
