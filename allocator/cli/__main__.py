"""``python -m allocator.cli``: the command line as a module, for launchers such as torchrun."""

from allocator.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
