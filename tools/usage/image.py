"""The class of each image: python usage.py a.jpg b.jpg. Needs numpy, onnxruntime and pillow."""

import json, pathlib, sys

import numpy as np, onnxruntime
from PIL import Image, ImageOps

folder = pathlib.Path(__file__).parent
facts = json.loads((folder / "export.json").read_text())
model = onnxruntime.InferenceSession(folder / "model.onnx")
for name in sys.argv[1:]:
    image = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    image = ImageOps.fit(image, facts["size"], facts["resample"], facts["margin"])
    logits = model.run(None, {"pixels": np.array(image).transpose(2, 0, 1)[None]})[0][0]
    print(facts["labels"][logits.argmax()], name, sep="\t")
