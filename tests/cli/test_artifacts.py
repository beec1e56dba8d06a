"""export, import, verify and show: directions to other tools and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch

from tests.cli.conftest import QUICK, Cli
from tests.cli.test_errors import refused

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace


def saved(path: Path, site: str = "L5.resid_post", *, where: str = "all", seed: int = 0, **given: Any) -> "Subspace":
    """A direction in a file."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import Where

    vector = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    notes = {"finder": "mean_difference", "data": {"name": "[red]colours[/red]"}}
    found = Subspace.span(vector, site=Site.parse(site), where=Where.parse(where), notes=notes, **given)
    found.save(path)
    return found


def test_there_and_back(cli: Cli, tmp_path: Path) -> None:
    from subspace_probe.core.subspaces import Subspace

    five, seven = saved(tmp_path / "five.st"), saved(tmp_path / "seven.st", "L7.resid_post", seed=1)
    result = cli("export", "five.st", "seven.st", "--out", "new/vec.gguf", "--model-hint", "qwen2", "-s", 2)
    assert result.exit_code == 0, result.output
    assert "--control-vector-scaled new/vec.gguf:1" in result.stdout
    reader = gguf.GGUFReader("new/vec.gguf")
    assert [t.name for t in reader.tensors] == ["direction.5", "direction.7"]
    assert np.array_equal(reader.tensors[1].data, (seven * 2.0).vector.numpy())
    result = cli("import", "new/vec.gguf", "--out", "back")
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("back").iterdir()} == {"L5.resid_post.safetensors", "L7.resid_post.safetensors"}
    back = Subspace.load("back/L5.resid_post.safetensors")
    assert torch.equal(back.vector, (five * 2.0).vector)
    assert back.notes == {**five.notes, "strength": 2.0, "model_hint": "qwen2"}
    assert cli("import", "new/vec.gguf", "--layer", 7, "--out", "seven.back").exit_code == 0
    assert torch.equal(Subspace.load("seven.back").vector, (seven * 2.0).vector)


@pytest.mark.slow
def test_a_direction_that_was_found_can_be_exported(cli: Cli, tiny: Path, colours: Path) -> None:
    found = cli("find", "--model", tiny, "--contrast", colours.name, *QUICK, "--quiet")
    assert found.exit_code == 0, found.output
    result = cli("export", "direction.safetensors", "--out", "vec.gguf", "--allow-not-found")
    assert result.exit_code == 0, result.output
    assert "! Found at last, but llama.cpp adds a control vector at every token" in result.stdout
    result = cli("verify", "vec.gguf", "--n-embd", 16, "--n-layers", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "llama.cpp takes it: vec.gguf\n"


def test_verify_fails_where_llama_cpp_would(cli: Cli, tmp_path: Path) -> None:
    saved(tmp_path / "five.st")
    assert cli("export", "five.st", "--out", "vec.gguf").exit_code == 0
    result = cli("verify", "vec.gguf", "--n-embd", 32, "--n-layers", 4)
    assert result.exit_code == 1
    assert result.stderr == "error: The vectors have the width 16, the model has 32.\n"
    assert "! direction.5 is never used: the model's last block is 3." in result.stdout
    Path("cut.gguf").write_bytes(Path("vec.gguf").read_bytes()[:-8])
    result = cli("verify", "cut.gguf")
    assert result.exit_code == 1
    assert "'cut.gguf' is a damaged GGUF file" in result.stderr
    assert "No file 'none.gguf'" in refused(cli, "verify", "none.gguf")


def test_import_of_a_published_tensor(cli: Cli) -> None:
    from subspace_probe.core.subspaces import Subspace

    stack = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    torch.save(stack, "mean_diffs.pt")
    result = cli("import", "mean_diffs.pt", "--layer", 4, "--position", -2, "--model", "someone/model")
    assert result.exit_code == 0, result.output
    found = Subspace.load("direction.safetensors")
    assert (str(found.site), str(found.where)) == ("blocks.4.hook_resid_pre", "at-2")
    assert found.vector.tolist() == pytest.approx(stack[-2, 4].tolist(), rel=1e-6)
    assert "L3.resid_post" in refused(cli, "export", "direction.safetensors", "--out", "vec.gguf")
    assert cli("export", "direction.safetensors", "--out", "vec.gguf", "--site", "L3.resid_post").exit_code == 0
    assert gguf.GGUFReader("vec.gguf").tensors[0].name == "direction.3"


def test_import_puts_the_vectors_of_the_generator_where_they_were_read(cli: Cli, tmp_path: Path) -> None:
    from subspace_probe.core.subspaces import Subspace

    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_tensor("direction.5", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert cli("import", "theirs.gguf", "--index-shift", -1, "--out", "one.st").exit_code == 0
    assert str(Subspace.load("one.st").site) == "blocks.4.hook_resid_post"


def test_show_says_what_a_file_is(cli: Cli, tmp_path: Path) -> None:
    saved(tmp_path / "five.st", where="last", found=False)
    result = cli("show", "five.st")
    assert result.exit_code == 0, result.output
    for shown in ("1 of 16", "L5.resid_post", "last", "mean_difference", '{"name": "[red]colours[/red]"}', "NOT FOUND"):
        assert shown in result.stdout
    assert cli("export", "five.st", "--out", "vec.gguf", "--allow-not-found").exit_code == 0
    result = cli("show", "vec.gguf")
    assert result.exit_code == 0, result.output
    for shown in ("L5.resid_post", "16", "mean_difference", "NOT FOUND"):
        assert shown in result.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export none.st --out vec.gguf", "No file 'none.st'"),
        ("export vec.gguf --out other.gguf", "is not a readable safetensors file"),
        ("export five.st --out .", "it is a folder"),
        ("export five.st --out /proc/vec.gguf", "Cannot write '/proc/vec.gguf'"),
        ("export five.st five.st --out new/vec.gguf", "Two directions are at block 5"),
        ("export five.st --out new/vec.gguf --strength 0", "strength of 0"),
        ("export five.st --out new/vec.gguf --site L0.resid_post", "cannot steer what block 0 hands on"),
        ("export five.st --out new/vec.gguf --site L-1.resid_post", "Give n_layers (--n-layers)"),
        ("export five.st --out new/vec.gguf --n-layers 4", "the model has 4 layers"),
        ("export five.st --out new/vec.gguf --site L5", "Cannot read the site 'L5'"),
        ("export lost.st --out new/vec.gguf", "--allow-not-found"),
        ("import none.pt", "'none.pt' cannot be read: No such file"),
        ("import .", "'.' cannot be read"),
        ("import text.txt", "is not a readable .pt file"),
        ("import five.st", "is a subspace of this package already"),
        ("import one.pt --index-shift 1", "is not GGUF. Leave it out"),
        ("import one.pt --out .", "it is a folder"),
        ("import one.pt --where lasst", "Did you mean 'last'?"),
        ("import numpy.pt", "runs code when it is read"),
        ("import rows.pt", "give layer, 0 to 3, not None"),
        ("import vec.gguf --layer 4", "--layer 4 was given, but 'vec.gguf' holds 5"),
        ("import vec.gguf --position -1", "is a control vector. Leave it out"),
        ("import vec.gguf --index-shift -1", "says itself where"),
        ("import vec.gguf --out .", "it is a folder"),
        ("import two.gguf --out new/two.safetensors", "holds 2 directions. Choose one with --layer, or give a folder"),
        ("import cut.gguf --out new/one.st", "is a damaged GGUF file"),
        ("show none.st", "cannot be read: No such file"),
        ("show one.pt", "is not a readable safetensors file"),
        ("show cut.gguf", "is a damaged GGUF file"),
    ],
)
def test_says_what_is_wrong_and_leaves_nothing(cli: Cli, tmp_path: Path, command: str, message: str) -> None:
    from subspace_probe.store.control_vectors import export_gguf

    five, six = saved(tmp_path / "five.st"), saved(tmp_path / "six.st", "L6.resid_post")
    saved(tmp_path / "lost.st", found=False)
    whole = export_gguf(five, tmp_path / "vec.gguf").read_bytes()
    export_gguf([five, six], tmp_path / "two.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.txt").write_text("hello")
    torch.save(torch.ones(16), tmp_path / "one.pt")
    torch.save(torch.ones(4, 16), tmp_path / "rows.pt")
    torch.save(np.ones(16), tmp_path / "numpy.pt")
    assert message in " ".join(refused(cli, *command.split()).split())


def test_compare_says_what_chance_gives(cli: Cli, tiny: Path, colours: Path, tmp_path: Path) -> None:
    import torch

    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace

    assert cli("-q", "capture", "--model", tiny, "--contrast", colours.name, "-o", tmp_path / "acts").exit_code == 0
    from subspace_probe.store import open_activations

    width = open_activations(tmp_path / "acts").width(Site(0))
    axes = torch.eye(width)
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "same", "apart")]
    for file, vector in zip(files, (axes[0], axes[0] + 0.05 * axes[1], axes[2]), strict=True):
        Subspace.span(vector, site=Site(0)).save(file)
    bare = cli("compare", *files[:2])
    assert bare.exit_code == 0, bare.output
    assert "unaudited" in bare.stdout
    assert "give --acts FOLDER" in bare.stdout
    full = cli("compare", *files, "--acts", tmp_path / "acts")
    assert full.exit_code == 0, full.output
    lines = [line for line in full.stdout.splitlines() if ".safetensors" in line]
    assert "supported" in lines[0]
    assert "inconclusive" in lines[1]
    one = cli("compare", files[0])
    assert one.exit_code == 2
    assert "Give at least two to compare" in one.stderr
