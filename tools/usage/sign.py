"""Gloss and category of each clip: python usage.py clip.npz other.npz. Needs numpy and onnxruntime."""

import json, pathlib, sys

import numpy as np, onnxruntime

folder = pathlib.Path(__file__).parent
facts = json.loads((folder / "export.json").read_text())
model = onnxruntime.InferenceSession(folder / "model.onnx")
for name in sys.argv[1:]:
    clip = np.load(name)
    frames = clip[facts["key"]].astype(np.float32)
    inputs = {"frames": frames[None], "attention_mask": np.ones((1, len(frames)), np.int64)}
    inputs |= {key: clip[key].astype(bool)[None] for key in facts["more"]}  # which points were detected
    gloss, category = model.run(None, inputs)
    print(facts["labels"][gloss.argmax()], facts["categories"][category.argmax()], name, sep="\t")
