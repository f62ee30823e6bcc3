"""`python -m luthier`, which is also how torchrun starts it."""

from luthier.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
