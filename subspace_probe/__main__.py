"""`python -m subspace_probe` is the command `subspace-probe`."""

from subspace_probe.cli.main import main

if __name__ == "__main__":
    main()
