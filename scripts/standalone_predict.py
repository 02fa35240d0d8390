"""An exported classifier without jaxcats: needs jax, flatbuffers, numpy, safetensors and Pillow."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file

folder, *pictures = sys.argv[1:]
facts = json.loads(Path(folder, "model.json").read_text())
how, size = facts["preprocess"], facts["preprocess"]["size"]
short = size if how["policy"] == "lesson" else int(size / how["crop_fraction"])
tensors = load_file(Path(folder, "model.safetensors"))
classify = jax.export.deserialize(bytearray(Path(folder, "model.stablehlo").read_bytes())).call
for name in pictures:
    image = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    sides = [int(short * side / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.Resampling[how["interpolation"].upper()])
    left, top = (round((side - size) / 2) for side in sides)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    print(name, dict(zip(facts["classes"], classify(tensors, pixels[None])[0].tolist(), strict=True)))
