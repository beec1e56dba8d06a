"""`subspace-probe export`, `import`, `verify`, `show`: directions for other tools, and from them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_probe.core.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace

Layers = Annotated[int | None, typer.Option("--n-layers", help="Number of blocks of the model.", min=1)]


def export(
    directions: Annotated[list[Path], typer.Argument(metavar="DIRECTION...", help="Files that find wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the control vector, as vec.gguf.")],
    strength: Annotated[float, typer.Option("--strength", "-s", help="Factor on every direction.")] = 1.0,
    model_hint: Annotated[
        str | None, typer.Option(help="The model's model_type, as qwen2. Shown by other tools.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="L9.resid_post; default is where it was found.")] = None,
    n_layers: Layers = None,
    allow_not_found: Annotated[
        bool, typer.Option("--allow-not-found", help="Also export what is marked as not found.")
    ] = False,
) -> None:
    """Write directions as a control vector for llama.cpp (GGUF), one for each layer."""
    from subspace_probe.cli.outputs import writable_file
    from subspace_probe.cli.terminal import say, wrote
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.store.control_vectors import export_gguf, import_gguf

    writable_file(out)
    loaded = [Subspace.load(path) for path in directions]
    if site is not None:
        place = Site.parse(site)
        loaded = [subspace.moved(place) for subspace in loaded]
    export_gguf(
        loaded,
        out,
        strength=strength,
        model_hint=model_hint,
        n_layers=n_layers,
        allow_not_found=allow_not_found,
    )
    _list(import_gguf(out).values())
    wrote(out)
    say(("Use it: ", "dim"), f"llama-cli -m MODEL.gguf --control-vector-scaled {out}:1 -p '...'")


def import_(
    file: Annotated[Path, typer.Argument(help="A control vector (.gguf), or a published tensor (.pt, .safetensors).")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File for the direction; a folder where there are several.")
    ] = Path("direction.safetensors"),
    layer: Annotated[
        int | None,
        typer.Option("--layer", "-l", help="Which one, where a file holds a direction for each layer.", min=0),
    ] = None,
    position: Annotated[
        int | None, typer.Option(help="Which one, where a tensor holds several positions: -1 is the last token.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Where a tensor belongs, if not at the input of --layer.")] = None,
    where: Annotated[str | None, typer.Option(help="The tokens a tensor was read at, if not at --position.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, for the notes.")] = None,
    index_shift: Annotated[
        int, typer.Option(help="Of a control vector: -1 for those of llama.cpp's cvector-generator.")
    ] = 0,
) -> None:
    """Read a direction that another tool wrote. Nothing in the file is run."""
    from subspace_probe.cli.outputs import writable_file
    from subspace_probe.cli.terminal import wrote
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import Where
    from subspace_probe.store.published import import_direction

    if _is_gguf(file):
        for name, given in {"--position": position, "--site": site, "--where": where, "--model": model}.items():
            if given is not None:
                raise ConfigError(f"{name} {given} was given, but {str(file)!r} is a control vector. Leave it out.")
        wrote(*_import_gguf(file, out, layer, index_shift))
        return
    if index_shift:
        raise ConfigError(f"--index-shift {index_shift} was given, but {str(file)!r} is not GGUF. Leave it out.")
    writable_file(out)
    found = import_direction(
        file,
        layer=layer,
        position=position,
        site=None if site is None else Site.parse(site),
        where=None if where is None else Where.parse(where),
        model=model,
    )
    found.save(out)
    _list([found])
    wrote(out)


def _import_gguf(file: Path, out: Path, layer: int | None, index_shift: int) -> list[Path]:
    from subspace_probe.cli.outputs import writable_file, writable_folder
    from subspace_probe.core.files import atomic_folder
    from subspace_probe.store.control_vectors import import_gguf

    found = import_gguf(file, index_shift=index_shift)
    if layer is not None:
        held = ", ".join(str(site.layer) for site in found)
        found = {site: each for site, each in found.items() if site.layer == layer}
        if not found:
            raise ConfigError(f"--layer {layer} was given, but {str(file)!r} holds {held}.")
    if len(found) == 1:
        paths = [writable_file(out)]
        next(iter(found.values())).save(out)
    else:
        if out.suffix:
            raise ConfigError(
                f"{str(file)!r} holds {len(found)} directions. Choose one with --layer, or give a folder."
            )
        writable_folder(out)
        paths = [out / f"{site.short}.safetensors" for site in found]
        with atomic_folder(out) as partial:
            for path, subspace in zip(paths, found.values(), strict=True):
                subspace.save(partial / path.name)
    _list(found.values())
    return paths


def verify(
    file: Annotated[Path, typer.Argument(help="A control vector (.gguf).")],
    n_embd: Annotated[int | None, typer.Option("--n-embd", help="Width of the model.", min=1)] = None,
    n_layers: Layers = None,
) -> None:
    """Would llama.cpp take this control vector? Exit code 1 where it would not."""
    from subspace_probe.cli.terminal import complain, plain, say, warn
    from subspace_probe.store.gguf_rules import verify_gguf

    found = verify_gguf(file, n_embd=n_embd, n_layers=n_layers)
    for warning in found.warnings:
        warn(plain(warning))
    for error in found.errors:
        complain(plain(error))
    if not found.ok:
        raise typer.Exit(1)
    say(("llama.cpp takes it", "bold green"), f": {file}")


def show(
    file: Annotated[Path, typer.Argument(help="A direction (.safetensors) or a control vector (.gguf).")],
) -> None:
    """Say what a file holds: where it was found, how long it is, and what found it."""
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.store.control_vectors import import_gguf

    if not _is_gguf(file):
        _describe(Subspace.load(file))
        return
    found = list(import_gguf(file).values())
    _list(found)
    if len(found) == 1:
        _describe(found[0])


def _describe(subspace: "Subspace") -> None:
    import json

    from rich.table import Column

    from subspace_probe.cli.terminal import grid, plain, warn

    lengths = ", ".join(f"{length:.4g}" for length in subspace.scale[:5].tolist())
    rows: dict[str, Any] = {
        "rank": f"{subspace.rank} of {subspace.width}",
        "site": "not said" if subspace.site is None else subspace.site.short,
        "where": "not said" if subspace.where is None else str(subspace.where),
        "found": "yes" if subspace.found else "no",
        "scale": f"{lengths}{', ...' if subspace.rank > 5 else ''} ({subspace.scale_unit})",
        "reader": "its own" if subspace.reader is not None else "the basis",
    }
    for name, value in subspace.notes.items():
        rows[name] = value if isinstance(value, str) else json.dumps(value)
    grid(
        [Column("", style="dim", no_wrap=True), Column("", overflow="fold")],
        [(plain(name), plain(str(value))) for name, value in rows.items()],
    )
    if not subspace.found:
        warn("Marked NOT FOUND: nothing beyond what shuffled labels give. Do not read it as a finding.")


def _list(subspaces: "Iterable[Subspace]") -> None:
    """A line for each direction."""
    from subspace_probe.cli.terminal import grid, right

    grid(
        ["site", "where", right("width"), right("length"), "found"],
        [
            [
                "not said" if each.site is None else each.site.short,
                "not said" if each.where is None else str(each.where),
                str(each.width),
                f"{float(each.scale[0]):.4g}",
                "yes" if each.found else "no",
            ]
            for each in subspaces
        ],
    )


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
