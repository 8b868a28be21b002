"""Triton's kernels on the CPU: its interpreter runs them program by program, with numpy.

It shows that a kernel is called with the right arguments and gives the right numbers; nothing of its speed, nor of
TF32, shared memory and races. It has no bfloat16: products of that dtype come out wrong.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_interpreted(module: str, function: str, *arguments: str | None) -> Any:
    """Return what ``function`` of ``module`` returns (as JSON) in a process of its own, with the interpreter on.

    Triton asks for its interpreter when a kernel is defined: this process may have imported some already.
    """
    code = (
        "import json\n"
        "from tests.interpreted_triton import prepare\n"
        "prepare()\n"
        f"from {module} import {function}\n"
        f"print(json.dumps({function}(*{arguments!r})))\n"
    )
    paths = os.pathsep.join([*filter(None, sys.path), str(ROOT)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def prepare() -> None:
    """Make the interpreter run kernels that were written for a GPU; call it before any is imported.

    - There is no device to measure configurations on: the first of each is taken.
    - A loop's index is an integer in the interpreter, a scalar tensor for the compiler, and kernels use it as one.
    - Narrow products are refused, as the compiler for CUDA refuses them.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import min_dot_size
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    torch.set_num_threads(1)
    create = Autotuner.__init__

    def create_with_one_configuration(self: Autotuner, *args: Any, **options: Any) -> None:
        create(self, *args, **options)
        self.configs = self.configs[:1]

    class ScalarIndices(interpreter.ASTTransformer):  # type: ignore[misc]
        def visit_For(self, node: ast.For) -> ast.AST:  # noqa: N802
            loop = self.generic_visit(node)
            if isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) in ("range", "tl.range"):
                to_tensor = ast.parse("interpreter_semantic.to_tensor", mode="eval").body
                node.iter = ast.Call(ast.Name("map", ast.Load()), [to_tensor, node.iter], [])
            return loop

    Autotuner.__init__ = create_with_one_configuration
    interpreter.FunctionRewriter.ast_transformer = ScalarIndices()
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))
