"""How tests start a script in several processes, as the library does."""

CODE = (
    "import os, sys; from diffdiv.runtime.launch import launch; "
    "sys.exit(launch(sys.argv[1], sys.argv[2:], int(os.environ.get('PROCESSES', '2'))))"
)
