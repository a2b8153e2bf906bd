"""One distillation cycle of SDXL at 1024 pixels, real size, random weights.

    python benchmarks/sdxl_step.py --batch 8 --checkpointing
    python benchmarks/sdxl_step.py --device cpu --tiny --cycles 1      # does the program work?

What is measured and how: benchmarks/step_bench.py.
"""

from step_bench import main

if __name__ == "__main__":
    main("sdxl", 1024, __doc__)
