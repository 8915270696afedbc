from __future__ import annotations

import subprocess
import sys

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in BLOCKED:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocker())
"""
NEVER = ["ray", "typer", "fsspec", "av", "pydantic", "pyarrow", "webdataset", "PIL", "simplejpeg", "yaml", "rfc8785"]


def run(code, blocked):
    script = f"BLOCKED = {set(blocked)!r}\n{BLOCK}\n{code}"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_torch_numpy_and_safetensors_are_enough_to_tokenize():
    """A GPU machine without the rest of the dependencies builds the model, encodes and decodes."""
    code = """
import pkgutil, importlib, torch, tokenizer
for module in pkgutil.iter_modules(tokenizer.__path__, "tokenizer."):
    importlib.import_module(module.name)
model = tokenizer.from_pretrained("untrained:vit-tiny-32-l18")
bits = model.encode(torch.zeros(2, 3, 32, 32, 3, dtype=torch.uint8))
print(list(model.decode(bits).shape))
"""
    assert run(code, [*NEVER, "pipeline", "jobs"]) == "[2, 3, 32, 32, 3]"


def test_the_package_and_a_stored_config_need_no_torch(tmp_path, tiny):
    from tokenizer.checkpoint import save_checkpoint, weight_sha256

    save_checkpoint(tiny, tmp_path)
    code = f"""
import tokenizer
from tokenizer.checkpoint import read_checkpoint
files = read_checkpoint({str(tmp_path)!r})
print(files.config().preset, files.weight_sha256())
"""
    assert run(code, [*NEVER, "torch", "numpy", "safetensors"]) == f"vit-tiny-32-l18 {weight_sha256(tiny)}"


def test_every_public_name_resolves():
    import tokenizer

    for name in tokenizer.__all__:
        assert getattr(tokenizer, name).__name__ == name
    assert set(tokenizer.__all__) <= set(dir(tokenizer))
    assert not hasattr(tokenizer, "nothing")
