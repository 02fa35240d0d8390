"""An exported classifier without jaxcats: needs jax, flatbuffers, numpy, safetensors and Pillow."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file

folder, *images = sys.argv[1:]
facts = json.loads(Path(folder, "model.json").read_text())
preprocess, size = facts["preprocess"], facts["preprocess"]["size"]
shorter = size if preprocess["policy"] == "lesson" else int(size / preprocess["crop_fraction"])
tensors = load_file(Path(folder, "model.safetensors"))
classify = jax.export.deserialize(bytearray(Path(folder, "model.stablehlo").read_bytes())).call
for name in images:
    image = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    sides = [int(shorter * side / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.Resampling[preprocess["interpolation"].upper()])
    left, top = (round((side - size) / 2) for side in sides)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    print(name, dict(zip(facts["classes"], classify(tensors, pixels[None])[0].tolist(), strict=True)))
