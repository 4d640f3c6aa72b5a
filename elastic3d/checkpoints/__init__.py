"""Published weights: their configuration parsed, their tensors renamed and checked, one module a family.

from elastic3d.checkpoints.triposg import load_triposg
from elastic3d.checkpoints.step1x3d import load_step1x3d
from elastic3d.checkpoints.hunyuan3d import load_hunyuan3d

bundle = load_triposg("TripoSG")
latents = bundle.sample(condition, noise, steps=50, guidance=7.0)
field = bundle.vae.query(points, bundle.vae.decode(latents))
"""
