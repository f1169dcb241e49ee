"""The class of each image or folder of frames: python usage.py a.jpg frames/. Needs numpy, onnxruntime, pillow."""

import json, pathlib, sys

import numpy as np, onnxruntime
from PIL import Image, ImageOps

folder = pathlib.Path(__file__).parent
facts = json.loads((folder / "export.json").read_text())
model = onnxruntime.InferenceSession(folder / "model.onnx")
for path in map(pathlib.Path, sys.argv[1:]):
    images = [Image.open(name) for name in (sorted(path.iterdir()) if path.is_dir() else [path])]
    images = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
    images = [ImageOps.fit(image, facts["size"], facts["resample"], facts["margin"]) for image in images]
    logits = model.run(None, {"pixels": np.stack(images).transpose(0, 3, 1, 2)[None]})[0]
    print(facts["labels"][logits.argmax()], path, sep="\t")
