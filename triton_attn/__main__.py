"""`python -m triton_attn`: the command line."""

from triton_attn.cli import main

if __name__ == "__main__":
    main()
