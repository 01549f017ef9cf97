"""Small good files of every kind that is read, to be damaged; made afresh in a folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from damage import Files
from small_checkpoints import micro

from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import synthesize
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.state import save_state
from refimpl.engine.model import EngineModel
from refimpl.golden.dump import golden_arrays
from refimpl.golden.files import write_golden
from refimpl.reference.model import ReferenceModel

PROMPT = [5, 17, 30, 4, 9, 12]
MLX = Path(__file__).parents[1] / "golden" / "mlx4"
TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "{%- if tools %}{{ tools | tojson }}{% endif %}{%- for m in messages %}{%- if loop.first and "
    "m['role'] == 'system' %}{{ m['content'] | trim }}{% elif m.tool_calls %}{% for c in "
    "m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | items | list }}){% endfor %}"
    "{% else %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}[{{ text }}]"
    "{% endif %}{% endfor %}",
)


def files_of(folder: Path) -> Files:
    """A folder's files by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


class Seeds:
    """Good files by kind, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cached_property
    def folder(self) -> Path:
        """The micro model as a Hugging Face folder in F32."""
        return synthesize(micro(), 5, self.root / "good", "f32")

    def gguf(self, file_type: str) -> Path:
        """The micro model as a GGUF file (`good-TYPE.gguf`)."""
        out = self.root / f"good-{file_type}.gguf"
        if not out.exists():
            convert(self.folder, out, file_type)
        return out

    def of(self, kind: str) -> list[Files]:
        """The seeds of a kind."""
        made: list[Files] = getattr(self, "_" + kind.replace(".", "_").replace("-", "_"))()
        return made

    def _gguf(self) -> list[Files]:
        types = ("f32", "bf16", "f16", "q8_0", "q4_0", "q4_k_s", "q5_k_m", "q6_k", "iq4_xs")
        made = [{"m.gguf": self.gguf(t).read_bytes()} for t in types]
        return [*made, *self._split()]

    def _split(self) -> list[Files]:
        """The same in two files."""
        from gguf import GGUFReader, GGUFWriter

        names = [f"s-{i:05d}-of-00002.gguf" for i in (1, 2)]
        reader = GGUFReader(self.gguf("q8_0"))
        half, writers = len(reader.tensors) // 2, []
        for part in range(2):
            writer = GGUFWriter(self.root / names[part], "step35")
            if part == 0:
                for field in reader.fields.values():
                    if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                        value, kinds = field.contents(), field.types
                        sub = kinds[1] if len(kinds) > 1 else None
                        writer.add_key_value(field.name, value, kinds[0], sub)
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", len(reader.tensors))
            for tensor in reader.tensors[half:] if part else reader.tensors[:half]:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            writers.append(writer)
        for writer in writers:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return [{n: (self.root / n).read_bytes() for n in names}]

    def _gguf_vocabulary(self) -> list[Files]:
        from damage_gguf import gguf_header

        data = self.gguf("f32").read_bytes()
        header = gguf_header(data)
        head = data[: header.keys[-1][1]]  # no tensors
        return [{"m.gguf": head[:8] + bytes(8) + head[16:]}]

    def _hf(self) -> list[Files]:
        made = [files_of(self.folder)]
        for dtype, shard in (("bf16", 10**9), ("f16", 60_000)):
            out = self.root / dtype
            if not out.exists():
                synthesize(micro(), 5, out, dtype, shard)
            made.append(files_of(out))
        return made

    def _fp8(self) -> list[Files]:
        out = self.root / "fp8"
        if not out.exists():
            synthesize(micro(), 5, out, "fp8")
        return [files_of(out)]

    def _mlx(self) -> list[Files]:
        return [files_of(MLX)]

    def _config_json(self) -> list[Files]:
        return [files_of(self.folder)]

    def _tokenizer_json(self) -> list[Files]:
        keep = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        made = {n: c for n, c in files_of(self.folder).items() if n in keep}
        made["chat_template.jinja"] = TEMPLATES[0].encode()
        return [made]

    def _template(self) -> list[Files]:
        return [{"t.jinja": text.encode()} for text in TEMPLATES]

    def _state(self) -> list[Files]:
        made = []
        for name in ("reference", "engine"):
            path = self.root / f"{name}.state"
            model = self.backend(name)
            options = GenerateOptions(max_new_tokens=0, prefill_chunk=4)
            save = functools.partial(save_state, path, model)
            generate(model, PROMPT, options, on_prefilled=save)
            made.append({f"{name}.state": path.read_bytes()})
        return made

    @functools.cache  # noqa: B019  # one object of this class lives as long as the program
    def backend(self, name: str) -> Any:
        """A good model to use state files and candidates with."""
        source = open_checkpoint(self.gguf("q8_0"))
        return ReferenceModel(source) if name == "reference" else EngineModel(source, threads=1)

    def golden_parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays and description of a golden run."""
        return golden_arrays(self.backend("reference"), PROMPT, 2), {"dtype": "float32"}

    def _golden(self) -> list[Files]:
        path = self.root / "g.npz"
        write_golden(path, *self.golden_parts())
        return [{"g.npz": path.read_bytes()}]

    def _candidate(self) -> list[Files]:
        arrays, _ = self.golden_parts()
        logits = arrays["logits"].astype(np.float32)
        maxtext = {"tokens": PROMPT, "logits": np.round(logits.astype(float), 3).tolist()}
        top = {"tokens": PROMPT, "top_k_logits": [[1.0, 0.5]] * 6, "top_k_indices": [[3, 4]] * 6}
        others = [{"token": "b", "logprob": -1.5, "id": 71}, {"token": "token_id:5", "logprob": -2}]
        chosen = {"token": "a", "logprob": -0.5, "bytes": [97], "id": 70, "top_logprobs": others}
        chat = {"choices": [{"logprobs": {"content": [chosen, chosen]}}]}
        old = {"choices": [{"logprobs": {"tokens": ["a", "b"], "token_logprobs": [None, -1.0],
               "top_logprobs": [None, {"a": -1.0, "c": -2.0}]},
               "prompt_logprobs": [None, {"5": {"logprob": -1.0}}]}]}  # fmt: skip
        lines = "\n".join(json.dumps(r) for r in (top, chat, old))
        (self.root / "l.npy").unlink(missing_ok=True)
        np.save(self.root / "l.npy", logits)
        return [
            {"c.jsonl": json.dumps(maxtext).encode()},
            {"c.jsonl": lines.encode()},
            *({"c.jsonl": json.dumps(r).encode()} for r in (top, chat, old)),
            {"c.npy": (self.root / "l.npy").read_bytes()},
            {"c.txt": _dump(arrays["hidden"][1]).encode()},
            {"c.npz": self._golden()[0]["g.npz"]},
            {"c.json": json.dumps(PROMPT).encode()},
        ]


def _dump(rows: np.ndarray) -> str:
    """Rows (T, H) as llama.cpp prints a tensor."""
    t, h = rows.shape
    lines = [f"l_out-0 = (f32) ADD(a{{{h}, {t}, 1, 1}}, b) = {{{h}, {t}, 1, 1}}", " [", "  ["]
    for row in rows:
        shown = [*row[:3], "...", *row[-3:]]
        values = ", ".join(v if isinstance(v, str) else f"{v:12.4f}" for v in shown)
        lines.append(f"   [ {values} ],")
    return "\n".join([*lines, "  ],", " ]", " sum = 1.0"])
