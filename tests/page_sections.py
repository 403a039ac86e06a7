"""Check the page of one head on one data set against numpy on the features and labels of a store."""

import re
from collections import Counter
from html import escape

import numpy as np


def check_sections(text, head, store):
    """Recall of each class, the calibration error, and a picture for each of up to three rows of every confusion."""
    features, labels = store.numpy(np.float32)
    logits = head.logits(features).astype(np.float64)
    predicted = logits.argmax(1)
    table = text[text.index("Recall by class") :]
    for label, name in enumerate(store.classnames):
        recall = (predicted == labels)[labels == label].mean()
        assert re.search(rf'<th scope="row">{re.escape(escape(name))}</th><td data-v="{recall:.6g}"', table)
    wrong = Counter((a, b) for a, b in zip(labels.tolist(), predicted.tolist(), strict=True) if a != b)
    assert wrong, "nothing to show"
    for (label, guess), n in wrong.items():
        names = (escape(store.classnames[c]) for c in (label, guess))
        assert "<b>{}</b> predicted as <b>{}</b>".format(*names) in text
        assert f"{n} of {(labels == label).sum()} rows" in text
    assert text.count("data:image/png") == sum(min(3, n) for n in wrong.values())
    chances = np.exp(logits - logits.max(1, keepdims=True))
    sure = (chances / chances.sum(1, keepdims=True)).max(1)
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = [abs(((predicted == labels) - sure.astype(np.float64))[bins == b].sum()) for b in range(15)]
    assert f"ECE {100 * sum(gaps) / len(labels):.1f} → " in text
    assert "after temperature scaling" in text
