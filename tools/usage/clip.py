"""The similarity of texts to an image: python usage.py a.jpg "a chair" "a table". Needs tokenizers and pillow, too."""

import json, pathlib, sys

import numpy as np, onnxruntime, tokenizers
from PIL import Image, ImageOps

folder = pathlib.Path(__file__).parent
facts = json.loads((folder / "export.json").read_text())
tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
of_image, of_text = (onnxruntime.InferenceSession(folder / name) for name in ("image.onnx", "text.onnx"))
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
image = ImageOps.fit(image, facts["size"], facts["resample"], facts["margin"])
found = tokenizer.encode_batch(sys.argv[2:])
inputs = {name: np.array([getattr(text, part) for text in found]) for name, part in facts["tokens"].items()}
embedding = of_image.run(None, {"pixels": np.array(image).transpose(2, 0, 1)[None]})[0][0]
for similarity, text in sorted(zip(of_text.run(None, inputs)[0] @ embedding, sys.argv[2:]), reverse=True):
    print(f"{similarity:.3f}", text, sep="\t")
