"""The benchmarks behind `counterfake run benchmark`: one file each, and the harness they share.

A benchmark module has
    UNIT          of its figures
    CONTESTANTS   {name: build(spec) -> Contestant}, run in a process of their own; the first is ours
    LIMIT         the contestant that bounds what ours can reach, or ""
    NEEDS         {name: packages of a scratch environment}, for peers that are no dependency of the project
    setting_up(job, folder, console) -> {name: value} for Spec.inputs: makes and caches what is measured on
and may have WRITERS {name: write(spec)}, which store the input in a peer's own format, in that peer's environment. What a
GPU does with the steps of gan, swap and detector is in gpu.py and gpu_cases.py, which need torch and nothing else.
Heavy imports stand inside functions: a module is also imported where only a peer's packages are.
"""
