"""How many of the hidden words that tell the value of a concept a model fills in with that value:

    python accuracy.py MODEL RECORDS [SHARE HIDDEN]

A word tells a value if, in all records, it stands in sentences with that value alone: `kicks` tells
present, singular and sport, `kick` tells sport. What the model fills in is right if it tells the
same value, whatever word it is.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch

from dlmctl.models.loading import load_policy
from dlmctl.records.jsonl import read_records
from dlmctl.sae.corpus import MaskLaw, documents, masked_corpus
from dlmctl.sae.evaluation.sentences import sentence_labels, token_sentences

model, file, *rest = sys.argv[1:]
share = float(rest[0]) if rest else 0.3
policy = load_policy(model, "cpu")
texts = list(documents(read_records([file]), policy, 2048))

seen = defaultdict(set)
"""Concept and token to the values of the sentences that it stands in."""
labels = {}
for text in texts:
    spans = sentence_labels(text.record)
    labels[text.number] = [spans[n] if n >= 0 else {} for n in token_sentences(text, policy)]
    for token, label in zip(text.ids, labels[text.number], strict=True):
        for name in label.keys() - {"start", "end"}:
            seen[name, token].add(label[name])
told = {key: next(iter(values)) for key, values in seen.items() if len(values) == 1}

right, hidden = defaultdict(int), defaultdict(int)
for batch in masked_corpus(texts, policy, MaskLaw(share, share), 64):
    rows, places = batch.selected("mask").nonzero(as_tuple=True)
    with torch.no_grad():
        guesses = policy.predict(batch.masked_ids, batch.valid, rows, places).argmax(-1)
    for row, place, guess in zip(rows.tolist(), places.tolist(), guesses.tolist(), strict=True):
        text = batch.documents[row]
        for name, value in labels[text.number][place].items():
            if (name, text.ids[place]) in told:
                hidden[name] += 1
                right[name] += told.get((name, guess)) == value
for name, count in hidden.items():
    print(json.dumps({"concept": name, "hidden": count, "right": right[name] / count}))
