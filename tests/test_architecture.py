"""Do imports point one way? Parses every module; the table below is the design's layout.

captures <- host side (no torch) and device side (no scheduler) <- step_inputs, model_runner
<- engine <- jobs <- perf, cli.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module that is missing here fails a test: say which side it is on.
LAYERS: Mapping[str, tuple[str, ...]] = {
    # Leaves that both sides may use. Neither torch nor state.
    "common": ("errors", "config", "cuda_context", "rope_config", "model_config", "hub", "version"),
    # What to run. Imports no torch, not even through others.
    "host": (
        "request",
        "entry",
        "block_manager",
        "sequence_table",
        "stretches",
        "scheduler",
        "metrics",
        "tokenizer",
        "intake",
        "prompt_file",
        "output_file",
        "progress",
        "exit_codes",
        "options",
        "standard_streams",
        "demo",
        "demo.sums",
    ),
    # How it is computed. Knows nothing of sequences, blocks in use or schedules.
    "device": (
        "attention",
        "attention.base",
        "attention.flash",
        "attention.flash4",
        "attention.flash4_compile",
        "attention.flash4_kernels",
        "attention.reference",
        "kernels",
        "kernels.ahead",
        "kernels.decode_attention",
        "kernels.decode_chain",
        "kernels.exclusive",
        "kernels.fused",
        "kernels.fused_linear",
        "kernels.fused_sampling",
        "kernels.gated_linear",
        "kernels.launch",
        "kernels.linked",
        "kernels.nvrtc",
        "kernels.paged_decode",
        "kernels.reference",
        "kernels.row_attention",
        "kernels.tiles",
        "kernels.tuned",
        "kernels.ways",
        "checkpoint",
        "kv_cache",
        "layers",
        "model",
        "sampler",
        "weights",
    ),
    # The first two alone turn the one into the other.
    "step": ("step_inputs", "model_runner", "prefill_graphs"),
    "engine": (
        "resolve",
        "build",
        "plan",
        "trace",
        "tuning",
        "tuning_file",
        "tuning_trial",
        "engine",
    ),
    # Dataset jobs. The engine is imported when it is made, in a worker: the rest loads no torch.
    "jobs": (
        "jobs",
        "jobs.channel",
        "jobs.config",
        "jobs.extras",
        "jobs.feed",
        "jobs.inputs",
        "jobs.job",
        "jobs.journal",
        "jobs.lines",
        "jobs.loop",
        "jobs.manifest",
        "jobs.openai_batch",
        "jobs.output",
        "jobs.ray_data",
        "jobs.recognize",
        "jobs.row_format",
        "jobs.row_set",
        "jobs.rows",
        "jobs.sampling",
        "jobs.shard",
        "jobs.store",
        "jobs.tasks",
        "jobs.template",
        "jobs.watch",
        "jobs.worker",
        "jobs.workers",
    ),
    # Made the demo model; nothing imports it.
    "tool": ("demo.train",),
}
MAY_IMPORT: Mapping[str, set[str]] = {
    "captures": {"captures"},
    "common": {"common"},
    "host": {"common", "host"},
    "device": {"common", "device"},
    "step": {"captures", "common", "host", "device", "step"},
    "engine": {"captures", "common", "host", "device", "step", "engine"},
    "jobs": {"common", "host", "engine", "jobs"},
    "tool": {"common", "host"},
    "top": {"captures", "common", "host", "device", "step", "engine", "jobs", "top"},
}
# Seconds to import, or needed on the device side alone.
SLOW = {"torch", "transformers", "triton", "flash_attn", "cuda", "safetensors", "tokenizers"}


def paths() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    files = sorted(ROOT.glob("cli.py"))
    for package in ("captures", "graphengine", "perf"):
        files += sorted((ROOT / package).rglob("*.py"))
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


MODULES = paths()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def layer_of(module: str) -> str:
    package, _, name = module.partition(".")
    if package == "captures":
        return "captures"
    if module in ("graphengine", "graphengine.jobs.command") or package in ("cli", "perf"):
        return "top"  # graphengine/__init__ hands out names lazily
    for layer, names in LAYERS.items():
        if name in names:
            return layer
    pytest.fail(f"{module} is not in LAYERS: which side is it on?")


def statements(module: str, *, at_import: bool) -> Iterator[ast.stmt]:
    """Import statements: all of them, or those that run when the module is imported."""
    pending: list[ast.AST] = [tree(module)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)


def imports(module: str, *, at_import: bool) -> set[str]:
    """Dotted names: our modules in full, `from package import module` included."""
    found: set[str] = set()
    for statement in statements(module, at_import=at_import):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{module} imports relative to itself"
            assert statement.module is not None
            found.add(statement.module)
            members = {f"{statement.module}.{alias.name}" for alias in statement.names}
            found |= members & set(MODULES)
    return found


def ours(names: set[str]) -> set[str]:
    return names & set(MODULES)


def loaded_with(module: str) -> set[str]:
    """What importing `module` loads: parent packages and theirs included; others by their root."""
    loaded: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in loaded:
            continue
        loaded.add(name)
        if name not in MODULES:
            continue
        parent = name.rpartition(".")[0]
        for found in [*imports(name, at_import=True), *([parent] if parent else [])]:
            pending.append(found if found in MODULES else found.partition(".")[0])
    return loaded


def test_the_table_lists_modules_that_exist() -> None:
    for layer, names in LAYERS.items():
        for name in names:
            assert f"graphengine.{name}" in MODULES, f"{name} of {layer} is gone"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    layer = layer_of(module)
    for name in ours(imports(module, at_import=False)):
        assert layer_of(name) in MAY_IMPORT[layer], f"{module} ({layer}) imports {name}"


def test_captures_knows_only_torch_numpy_and_the_driver() -> None:
    for module in MODULES:
        if layer_of(module) == "captures":
            others = {name.partition(".")[0] for name in imports(module, at_import=False)}
            others -= set(sys.stdlib_module_names)
            assert others <= {"captures", "torch", "numpy", "cuda"}, module


def test_only_two_modules_below_the_engine_see_both_sides() -> None:
    seeing = set()
    for module in MODULES:
        if layer_of(module) in ("engine", "top", "captures"):
            continue
        sides = {layer_of(name) for name in ours(imports(module, at_import=False))}
        if {"host", "device"} <= sides | {layer_of(module)}:
            seeing.add(module)
    assert seeing == {"graphengine.step_inputs", "graphengine.model_runner"}


WITHOUT_TORCH = [
    "graphengine",
    "cli",
    *(module for module in MODULES if layer_of(module) in ("common", "host", "jobs")),
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_host_side_loads_no_torch(module: str) -> None:
    assert not loaded_with(module) & SLOW


def test_host_side_loads_no_torch_in_fact() -> None:
    """What the parser cannot see: imports by name, and those of other packages. LLM can be had
    without torch too: the context of the GPU is begun before."""
    modules = [*WITHOUT_TORCH, "graphengine.engine"]
    code = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted({SLOW!r} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_modules_import_in_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " > ".join((*above, module))
        if module in done:
            return
        for name in ours(imports(module, at_import=True)):
            visit(name, (*above, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


# --- rules that hold in every module


def nodes(module: str) -> Iterator[ast.AST]:
    return ast.walk(tree(module))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_loads_code_or_pickles(module: str) -> None:
    """Security: safetensors only, and a checkpoint's own code is never run."""
    names = {name.partition(".")[0] for name in imports(module, at_import=False)}
    assert not names & {"pickle", "marshal", "dill", "joblib", "shelve"}
    for node in nodes(module):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec", "compile"), called


# Run by itself, in a process of its own, whose environment it sets before it imports a compiler.
SCRIPT = "graphengine.attention.flash4_compile"


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) != "top" and m != SCRIPT])
def test_environment_is_read_in_cli_only(module: str) -> None:
    text = MODULES[module].read_text("utf-8")
    assert "os.environ" not in text
    assert "getenv" not in text


def test_script_with_an_environment_of_its_own_is_imported_by_nobody() -> None:
    assert not [m for m in MODULES if SCRIPT in imports(m, at_import=False)]


KERNEL_MODULES = [m for m in MODULES if m.startswith(("kernels.", "graphengine.kernels."))]


@pytest.mark.parametrize("module", KERNEL_MODULES)
def test_kernels_are_launched_by_what_a_rehearsal_holds_back(module: str) -> None:
    """`kernel[grid](...)` would run on the garbage of a rehearsal, and compile there in turn."""
    for node in nodes(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = ast.unparse(node.func.value)
            assert not name.endswith("_kernel"), f"{name}[...](...): use ahead.launch"


# Called inside a captured step; a value read there would stop the host, or fail the capture.
STEP_MODULES = (
    "attention.flash",
    "attention.flash4",
    "attention.flash4_kernels",
    "kernels.decode_attention",
    "kernels.decode_chain",
    "kernels.fused",
    "kernels.fused_sampling",
    "kernels.gated_linear",
    "kernels.row_attention",
    "layers",
    "model",
    "sampler",
)


@pytest.mark.parametrize("name", STEP_MODULES)
def test_step_modules_read_nothing_back(name: str) -> None:
    for node in nodes(f"graphengine.{name}"):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func.attr
            assert called not in ("item", "tolist", "cpu", "numpy", "nonzero", "synchronize")


def test_parser_sees_what_it_should() -> None:
    """The test itself: an import in a function counts for the direction, not at import."""
    assert "transformers" in imports("graphengine.tokenizer", at_import=False)
    assert "transformers" not in imports("graphengine.tokenizer", at_import=True)
    assert "torch" in loaded_with("graphengine.build")
    assert "graphengine.engine" not in loaded_with("graphengine")
    assert {"captures", "torch"} <= loaded_with("captures.buckets"), "its package loads torch"
