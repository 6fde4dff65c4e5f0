"""The benchmarks run and are listed, and their copies of other packages' formats are right."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import sass
import tables
from catalogue import BENCHMARKS, command, page

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """Runs `python benchmarks` with these arguments."""
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "benchmarks", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def printed(name, *options):
    """Returns the tables that a benchmark prints when it runs with --small, as rows of cells."""
    finished = run(name, "--small", *options)
    assert finished.returncode == 0, finished.stderr
    blocks = [block.splitlines() for block in finished.stdout.split("\n\n")]
    lines = [[line for line in block if line.startswith("|")] for block in blocks]
    return [
        [line.strip("| ").replace("**", "").split(" | ") for line in table]
        for table in lines
        if table
    ]


def numbers(name):
    """Returns those tables as table[row][column]."""
    found = []
    for (_, *columns), _, *rows in printed(name):
        found.append(
            {name: dict(zip(columns, map(float, numbers), strict=True)) for name, *numbers in rows}
        )
    return found


def test_without_a_name_all_benchmarks_are_listed():
    finished = run()
    assert finished.returncode == 0
    for name, benchmark in BENCHMARKS.items():
        assert f"\n{name}: {benchmark.shows}. Takes {benchmark.takes}.\n" in finished.stdout
        assert f"\n    {command(name)}\n" in finished.stdout


def test_an_unknown_name_is_an_error_that_names_all():
    finished = run("sped")
    assert finished.returncode == 1
    assert all(name in finished.stderr for name in BENCHMARKS)


def test_every_benchmark_is_in_the_list():
    """A file with a function `main` is one."""
    with_main = {
        path.stem
        for path in (ROOT / "benchmarks").glob("[!_]*.py")
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "main"
            for node in ast.parse(path.read_text()).body
        )
    }
    assert with_main == set(BENCHMARKS)


def test_the_page_has_the_table_of_the_list():
    assert f"\n{page()}\n" in (ROOT / "docs" / "benchmarks.md").read_text()
    for benchmark in BENCHMARKS.values():
        assert not benchmark.page or (ROOT / "docs" / f"{benchmark.page}.md").is_file()


@pytest.mark.parametrize(
    ("x", "written"),
    [
        (1994.6, "1990"),
        (999.6, "1000"),
        (52.06, "52.1"),
        (0.44551, "0.446"),
        (0.0099996, "0.0100"),
        (-3.5, "-3.50"),
        (0.0, "0.00"),
        (1.03e24, "1.03e+24"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (None, ""),
    ],
)
def test_numbers_have_three_digits(x, written):
    assert tables.number(x) == written


def test_the_best_cells_of_a_column_are_bold():
    rows = {"a": ["2.0", "x"], "b": ["1.0", ""], "c": ["1.0", "y"], "d": ["", ""]}
    *_, a, b, c, d = tables.table("", ["ms", "note"], rows, best={"ms": min}).splitlines()
    assert a == "| a | 2.0 | x |"
    assert b == "| b | **1.0** |  |"
    assert c == "| c | **1.0** | y |"
    assert d == "| d |  |  |"


@pytest.mark.full
def test_stress_shows_that_our_formats_hold_and_where_others_fail():
    errors, largest_steps, root_ratios, betas = numbers("stress")
    assert len(betas) == 11
    assert all(row["worst"] < 0.15 for row in betas.values())  # after 1000 steps .14
    for kind, row in errors.items():
        for format, error in row.items():
            if not format.startswith(("optax", "FlashOptim", "bitsandbytes")):
                # Twice the worst of int8, which is .1.
                assert error < 0.2, (kind, format)
                assert largest_steps[kind][format] < 1.5, (kind, format)  # the worst is 1.3
                assert 0.95 < root_ratios[kind][format] < 1.05, (kind, format)
    hard = "log-normal scales, sigma 2, tenfold drop"
    flash, other = "FlashOptim, int8 moments", "bitsandbytes, 8 bits"
    assert largest_steps[hard][flash] > 1000  # a nu that is 0 next to a large one
    assert largest_steps[hard][other] > 1000
    # nu kept in bfloat16, or rounded to nearest, does not follow the gradients down.
    quiet = root_ratios["every second falls tenfold, long after"]
    assert all(quiet[name] > 1.2 for name in ("optax.adam, bfloat16 gradients", flash, other))


@pytest.mark.slow
def test_bytes_are_those_of_the_formats_and_all_state_is_updated_in_place():
    (table,) = numbers("bytes")
    for name, row in table.items():
        stored = row["weight"] + row["gradient"] + row["state"]
        assert row["arguments"] == pytest.approx(stored, abs=0.002), name
        # Everything but the gradients is donated, and used; what is left over is a table of
        # pointers to the outputs.
        assert row["aliased"] == pytest.approx(row["weight"] + row["state"], abs=0.002), name
        assert row["outputs"] == pytest.approx(row["aliased"], abs=0.002), name
    # A scale and a unit, 8 bytes, for each row of 256; all but 512 of 164,352 parameters have one.
    smallest = table["7 bytes"]
    assert smallest["arguments"] == pytest.approx(7 + 8 / 256, abs=0.03)
    assert table["bfloat16 moments"]["arguments"] == pytest.approx(12, abs=0.002)
    assert table["optax.adam"]["arguments"] == pytest.approx(16, abs=0.002)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "options", "number"),
    [("speed", ["--rounds", "1"], 3), ("gpu", [], 3), ("release", [], 1)],
)
def test_tables_of_times_come_out(name, options, number):
    found = printed(name, *options)
    assert len(found) == number
    for header, _, *rows in found:
        assert len(header) > 3
        assert len(rows) > 4
        for row in rows:
            assert float(row[1]) >= 0, row  # a ratio, which may round to 0.00


@pytest.mark.slow
def test_times_of_row_sparse_steps_come_out():
    of_settings, by_rows, of_missed = printed("row_sparse")
    settings = {row[0].split(": ")[-1] for row in of_settings[2:]}
    assert {"lazy", "exact", "lazy, int8 moments", "lazy, 5 bytes"} < settings
    assert len(by_rows) > 5
    assert len(of_missed) == 2 + 4
    for row in [*of_settings[2:], *by_rows[2:], *of_missed[2:]]:
        assert float(row[1]) > 0


# Two elements before a loop that runs twice and three elements in it, shortened from a real kernel.
KERNEL = """
.text.input_reduce_fusion:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/                   IMAD.MOV.U32 R6, RZ, RZ, -0x10 ;      /* 0x000000fffffd7e24 */
        /*0020*/                   FMNMX.NAN R7, |R12|, R7, !PT ;        /* 0x0000000c07077e09 */
        /*0030*/                   FMNMX.NAN R7, |R13|, R7, !PT ;        /* 0x0000000c07077e09 */
.L_x_0:
        /*0040*/                   FMNMX.NAN R7, R7, |R14|, !PT ;        /* 0x0000000c07077e09 */
        /*0050*/                   VIADD R6, R6.reuse, 0x40 ;            /* 0x0000004006067836 */
        /*0060*/                   ISETP.GE.U32.AND P0, PT, R6, 0x70, PT ;
        /*0070*/                   FMNMX.NAN R7, R7, |R15|, !PT ;        /* 0x0000000c07077e09 */
        /*0080*/                   FMNMX.NAN R7, R7, |R16|, !PT ;        /* 0x0000000c07077e09 */
        /*0090*/              @!P0 BRA `(.L_x_0) ;                       /* 0xfffffff000008947 */
        /*00a0*/              @!P1 EXIT ;                                /* 0x000000000000194d */
        /*00b0*/                   ULDC.64 UR6, c[0x0][0x208] ;          /* 0x0000820000067ab9 */
        /*00c0*/                   STG.E desc[UR6][R2.64], R7 ;          /* 0x0000000702007986 */
        /*00d0*/                   EXIT ;                                /* 0x000000000000794d */
.L_x_1:
        /*00e0*/                   BRA `(.L_x_1);                        /* 0xfffffffc00fc7947 */
        /*00f0*/                   NOP;                                  /* 0x0000000000007918 */
"""


def test_machine_instructions_count_as_often_as_they_run():
    counts = sass.executed(KERNEL)
    loop = {"FMNMX": 2 + 2 * 3, "VIADD": 2, "ISETP": 2, "BRA": 2}
    assert counts == {"LDC": 1, "IMAD": 1, **loop, "EXIT": 2, "ULDC": 1, "STG": 1}
    kinds = {"comparison": 8 + 2, "integer": 1 + 2, "memory": 3, "other": 2 + 2}
    assert sass.by_kind(counts) == kinds


@pytest.mark.parametrize(
    ("old", "new", "runs"),
    [
        ("R6, 0x70, PT", "R6, 0xb0, PT", 3),
        ("VIADD R6, R6.reuse, 0x40", "IADD3 R6, R6, 0x20, RZ", 4),
        ("IMAD.MOV.U32 R6, RZ, RZ, -0x10", "MOV R6, RZ", 2),
        ("GE.U32.AND P0", "GE.AND P0", 2),
        ("GE.U32.AND P0, PT, R6, 0x70", "EQ.AND P0, PT, R6, 0xf0", 4),
        ("@!P0 BRA", "@P0 BRA", 1),
    ],
)
def test_how_often_a_loop_runs(old, new, runs):
    assert old in KERNEL
    assert sass.executed(KERNEL.replace(old, new))["BRA"] == runs


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("R6, 0x70, PT", "R6, R8, PT"),
        ("RZ, RZ, -0x10", "RZ, RZ, R8"),
        ("VIADD R6, R6.reuse, 0x40", "VIADD R6, R6.reuse, R8"),
        ("FMNMX.NAN R7, R7, |R15|", "VIADD R6, R6, 0x1"),
        ("@!P0 BRA", "@!P2 BRA"),
        ("@!P0 BRA", "BRA"),
        ("@!P0 BRA", "BRA.U UP0,"),
    ],
)
def test_a_loop_without_a_counter_is_an_error(old, new):
    assert old in KERNEL
    with pytest.raises(ValueError, match="how often this loop runs"):
        sass.executed(KERNEL.replace(old, new))


def test_a_missing_compiler_is_asked_for(monkeypatch):
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"ptxas is not installed; .*uv run --group compilers"):
        sass.program("ptxas")


def group(*values, size=32):
    """One group of a codec: these values, then zeros."""
    return jnp.zeros(size, jnp.float32).at[: len(values)].set(jnp.asarray(values, jnp.float32))


def test_flashoptim_codes_by_hand():
    # 2 x / (1 + x) of 1/2 and 1/4 is 2/3 and 2/5; times 127 it is 84.7 and 50.8.
    mu = peers.companded().encode(group(4.0, -2.0, 1.0))
    assert mu.codes[:4].tolist() == [127, -85, 51, 0]
    np.testing.assert_allclose(
        peers.companded().decode(mu)[:4], [4, -4 * 85 / 169, 4 * 51 / 203, 0], rtol=1e-6
    )
    # Roots 2, 1, 1/10 and 1/1000 of 2: the last is 1/8 of a code, and lost.
    nu = peers.square_root().encode(group(4.0, 1.0, 1e-2, 1e-6))
    assert nu.codes[:4].tolist() == [255, 128, 13, 0]
    np.testing.assert_allclose(
        peers.square_root().decode(nu)[:4], [4, (256 / 255) ** 2, (26 / 255) ** 2, 0], rtol=1e-6
    )
    # float16 ends at 65504 and 2^-24.
    assert jnp.isinf(peers.companded().encode(group(1e5)).scales)
    assert peers.companded().encode(group(1e-8)).scales == 0


def test_bitsandbytes_codes_by_hand():
    values = peers.tree_values(signed=True)
    assert values.shape == (256,)
    assert np.all(np.diff(values) > 0)
    # 64 parts of [.1, 1], 32 of [.01, .1], and so on to [1e-7, 1e-6] itself; 0 and 1.
    largest = 1 - 0.9 / 128
    np.testing.assert_allclose(values[[0, 127, 128, 254, 255]], [-largest, 0, 5.5e-7, largest, 1])
    unsigned = peers.tree_values(signed=False)
    assert unsigned.shape == (256,)
    np.testing.assert_allclose(unsigned[:3], [0, 3.25e-7, 7.75e-7], rtol=1e-6)
    # A moment is its block's largest magnitude times the nearest value.
    codec = peers.dynamic_tree(signed=True)
    stored = codec.encode(group(8.0, -8.0, 8e-7, 8e-8, size=256))
    assert stored.scales.tolist() == [[8.0]]
    np.testing.assert_allclose(codec.decode(stored)[:4], [8, -8 * largest, 0, 0], rtol=1e-6)


@pytest.mark.filterwarnings("ignore")  # from within that package
def test_flashoptim_equals_its_package():
    quantization = pytest.importorskip("flashoptim_jax").quantization
    keys = jax.random.split(jax.random.key(0))
    normal, spread = (jax.random.normal(key, (64, 1024)) for key in keys)
    moment = (normal * jnp.exp(2 * spread)).at[3].set(0)
    for codec, x, quantize, dequantize in [
        (
            peers.companded(),
            moment,
            quantization.quantize_momentum,
            quantization.dequantize_momentum,
        ),
        (
            peers.square_root(),
            jnp.square(moment),
            quantization.quantize_variance,
            quantization.dequantize_variance,
        ),
    ]:
        ours, theirs = codec.encode(x), quantize(x)
        np.testing.assert_array_equal(ours.codes, theirs.values)
        np.testing.assert_array_equal(ours.scales.ravel(), theirs.scales)
        np.testing.assert_array_equal(codec.decode(ours), dequantize(theirs))


@pytest.mark.slow
@pytest.mark.full
def test_quality_at_size_trains_in_all_settings():
    ((header, _, *rows),) = printed("quality_at_size")
    assert header[:2] == ["setting", "bytes per parameter"]
    float32, plain, seven, five = (dict(zip(header, row, strict=True)) for row in rows)
    assert float(float32["bytes per parameter"]) == 16
    assert float(plain["bytes per parameter"]) == 8
    # Release leaves out the gradients in bfloat16.
    released = float(seven["bytes per parameter"]) - float(five["bytes per parameter"])
    assert released == pytest.approx(2, abs=0.01)  # two digits are shown
    # They learn, from the same weights: ln 256 is 5.55. Ours differ from float32 in what bfloat16
    # rounds to a relative 2^-8: the weights that they compute with.
    losses = [float(row["seed 0"]) for row in (float32, plain, seven, five)]
    assert max(losses) < 5
    assert losses[2:] == pytest.approx([losses[0]] * 2, rel=2**-8)


PUBLISHED = ROOT / "docs" / "quality_at_size.json"


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_published_quality_at_size_is_that_of_its_file(tmp_path):
    import quality_at_size  # with what the examples need

    runs = quality_at_size.load(PUBLISHED)
    seeds = sorted({run.seed for run in runs})
    # All are there, so that nothing is trained and no checkpoint made.
    assert {(run.setting, run.seed) for run in runs} == {
        *itertools.product(quality_at_size.DEFAULT, seeds)
    }
    runs = quality_at_size.complete(
        PUBLISHED, seeds, quality_at_size.FLAGS, tmp_path / "checkpoints"
    )
    assert not (tmp_path / "checkpoints").exists()
    assert all(run.parameters >= 10e6 and run.steps >= 2000 for run in runs)
    assert all(len(run.held_out) >= 10 for run in runs)
    page = (ROOT / "docs" / "quality.md").read_text()
    assert quality_at_size.summary(runs) in page
    quality_at_size.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("field", ["text", "flags"])
def test_quality_at_size_mixes_no_runs_that_do_not_compare(tmp_path, field):
    import quality_at_size

    first, *_ = quality_at_size.load(PUBLISHED)
    other = first._replace(**{field: "something else"})
    path = tmp_path / "runs.json"
    quality_at_size.save([other], path)
    with pytest.raises(ValueError, match=r"has a run of another kind: .*something else.*, and not"):
        quality_at_size.complete(path, [0], quality_at_size.FLAGS, tmp_path / "checkpoints")
    assert quality_at_size.load(path) == [other]


@pytest.mark.usefixtures("standard_promotion")
def test_the_gpt_names_its_settings_as_the_benchmarks_do(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "gpt")
    import precision
    from settings import RELEASED, settings

    assert set(precision.SETTINGS) <= {*settings("adamw"), *RELEASED.values()}
