"""The report of `refimpl inspect`: what a checkpoint is, holds, and lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refimpl.checkpoint.health import Finding, check_values
from refimpl.checkpoint.listing import Listed, Listing, list_checkpoint
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.pair import needed
from refimpl.config_io import to_hf
from refimpl.errors import CheckpointError
from refimpl.inventory import ROLES, TensorSpec, active_parameters, parameters
from refimpl.text.tokenizer import tokenizer_of

Progress = Callable[[int, int], None]
_SHOWN = 5


@dataclass(frozen=True)
class RoleTotal:
    """One role's share of a checkpoint; `types` maps stored type to bytes."""

    role: str
    tensors: int
    parameters: int
    stored_bytes: int
    types: dict[str, int]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, block scales included."""
        return 8 * self.stored_bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Inspection:
    """Everything that `refimpl inspect` prints.

    Attributes:
        roles: totals by inventory role, in the inventory's order.
        types: stored type to [tensors, bytes].
        tokenizer: what was found, or None; `tokenizer_problem` says why it cannot be used.
        findings: what --check found; None if the values were not read.
    """

    listing: Listing
    roles: tuple[RoleTotal, ...]
    types: dict[str, tuple[int, int]]
    tokenizer: dict[str, Any] | None
    tokenizer_problem: str | None
    findings: tuple[Finding, ...] | None = field(default=None)
    mtp_path: Path | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors of the model."""
        return sum(r.stored_bytes for r in self.roles)

    @property
    def parameters(self) -> int:
        """Parameters that the files hold."""
        return sum(r.parameters for r in self.roles)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter over the whole checkpoint."""
        return 8 * self.stored_bytes / self.parameters if self.parameters else 0.0

    @property
    def mtp_state(self) -> str:
        """'none', 'present', 'declared but absent' or 'incomplete'."""
        declared, there = self.listing.config.num_nextn_predict_layers, self.listing.mtp_present
        if not declared:
            return "none"
        if there == declared:
            return "present"
        specs = [t.spec for t in self.listing.tensors if t.spec is not None]
        return "incomplete" if any(s.role == "mtp" for s in specs) else "declared but absent"

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps the checkpoint from being used as it is, one sentence each."""
        found = list(_missing(self.listing, self.mtp_state))
        found += [
            f"{t.name} has shape {t.shape}, expected {t.spec.shape if t.spec else ()}"
            for t in self.listing.misshapen
        ]
        found += [sentence for _, sentence in self.listing.faults]
        if self.tokenizer_problem:
            found.append(self.tokenizer_problem)
        return (*found, *(f"{f.tensor}: {f.problem}" for f in self.findings or ()))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        listing, config = self.listing, self.listing.config
        return {
            "path": str(listing.path),
            "mtp_path": None if self.mtp_path is None else str(self.mtp_path),
            "mtp_layers_only": listing.mtp_only,
            "format": listing.form,
            "files": list(listing.files),
            "missing_files": list(listing.missing_files),
            "config": to_hf(config) | {"rope_divisors": _list(config.rope_divisors)},
            "parameters": self.parameters,
            "declared_parameters": None if listing.mtp_only else parameters(config),
            "active_parameters": None if listing.mtp_only else active_parameters(config),
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": self.bits_per_weight,
            "roles": [asdict(r) | {"bits_per_weight": r.bits_per_weight} for r in self.roles],
            "types": {k: {"tensors": n, "stored_bytes": b} for k, (n, b) in self.types.items()},
            "mtp": {
                "state": self.mtp_state,
                "declared": config.num_nextn_predict_layers,
                "present": listing.mtp_present,
            },
            "missing": [listing.file_name(t) for t in listing.missing],
            "unexpected": [t.name for t in listing.unexpected],
            "misshapen": [
                {"name": t.name, "shape": list(t.shape), "expected": list(t.spec.shape)}
                for t in listing.misshapen
                if t.spec is not None
            ],
            "tokenizer": self.tokenizer,
            "findings": None if self.findings is None else [asdict(f) for f in self.findings],
            "problems": list(self.problems),
        }


def _list(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)


def _missing(listing: Listing, mtp_state: str) -> list[str]:
    lost = [t for t in listing.missing if t.role != "mtp" or mtp_state == "incomplete"]
    found = [f"the file {name} is missing" for name in listing.missing_files]
    if lost:
        names = [listing.file_name(t) for t in lost[:_SHOWN]]
        more = ", ..." if len(lost) > _SHOWN else ""
        found.append(f"{len(lost)} tensors are missing: {', '.join(names)}{more}")
    return found


def inspect(
    path: Path,
    check: bool = False,
    progress: Progress | None = None,
    mtp_path: Path | None = None,
) -> Inspection:
    """Inspect a checkpoint, complete or not.

    Args:
        check: also read every block of every tensor that is there.
        progress: called with (bytes read, bytes in all) while checking.
        mtp_path: a second checkpoint that holds the MTP layers.

    Raises:
        CheckpointError, ConfigError: the headers or the configuration cannot be read.
    """
    listing = list_checkpoint(path, mtp_path)
    tokenizer, problem = _tokenizer(listing)
    findings = tuple(_check(listing, mtp_path, progress)) if check else None
    return Inspection(
        listing, _roles(listing), _types(listing.tensors), tokenizer, problem, findings, mtp_path
    )


def _roles(listing: Listing) -> tuple[RoleTotal, ...]:
    totals = []
    for role in ROLES:
        here = [t for t in listing.tensors if t.spec is not None and t.spec.role == role]
        if here:
            types = {kind: size for kind, (_, size) in _types(tuple(here)).items()}
            held = [t.spec for t in here if t.spec is not None and t.fits and not t.scale]
            count = sum(s.elements for s in held if s.is_parameter)
            size = sum(t.stored_bytes for t in here)
            totals.append(RoleTotal(role, len(here), count, size, types))
    return tuple(totals)


def _types(tensors: tuple[Listed, ...]) -> dict[str, tuple[int, int]]:
    types: dict[str, tuple[int, int]] = {}
    for t in tensors:
        n, size = types.get(t.kind, (0, 0))
        types[t.kind] = (n + 1, size + t.stored_bytes)
    return dict(sorted(types.items(), key=lambda item: -item[1][1]))


def _tokenizer(listing: Listing) -> tuple[dict[str, Any] | None, str | None]:
    try:
        found = tokenizer_of(listing.path, listing.metadata or None)
    except CheckpointError as error:
        return None, str(error)
    if found is None:
        return None, None
    v = found.vocabulary
    return {
        "entries": len(v.tokens),
        "merges": len(v.merges),
        "pre_tokenizer": v.pre or None,
        "special_ids": dict(v.special_ids),
        "chat_template_characters": None if v.chat_template is None else len(v.chat_template),
    }, None


def _check(listing: Listing, mtp_path: Path | None, progress: Progress | None) -> list[Finding]:
    usable = {t.spec for t in listing.tensors if t.spec is not None and t.fits and not t.scale}
    usable -= {spec for spec, _ in listing.faults}
    order = {s: i for i, s in enumerate(t.spec for t in listing.tensors)}

    def elsewhere(spec: TensorSpec) -> bool:
        return mtp_path is not None and needed(spec)

    sources = [open_checkpoint(listing.path, wanted=lambda s: s in usable and not elsewhere(s))]
    if mtp_path is not None:
        sources.append(open_checkpoint(mtp_path, wanted=lambda s: s in usable and needed(s)))
    tensors = [t for source in sources for t in source.tensors]
    try:
        return check_values(sorted(tensors, key=lambda t: order[t.spec]), progress)
    finally:
        for source in sources:
            source.close()
