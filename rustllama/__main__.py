"""`python -m rustllama` is the `rustllama` command."""

from rustllama.cli import main

if __name__ == "__main__":
    main()
