"""The class of each text: python usage.py "a text" "another". Needs numpy, onnxruntime and tokenizers."""

import json, pathlib, sys

import numpy as np, onnxruntime, tokenizers

folder = pathlib.Path(__file__).parent
facts = json.loads((folder / "export.json").read_text())
tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
model = onnxruntime.InferenceSession(folder / "model.onnx")
found = tokenizer.encode_batch(sys.argv[1:])
inputs = {name: np.array([getattr(text, part) for text in found]) for name, part in facts["tokens"].items()}
for text, logits in zip(sys.argv[1:], model.run(None, inputs)[0]):
    print(facts["labels"][logits.argmax()], text, sep="\t")
