"""One distillation cycle of Stable Diffusion 1.5 at 512 pixels, real size, random weights.

    python benchmarks/sd_step.py --batch 8 --checkpointing
    python benchmarks/sd_step.py --device cpu --tiny --cycles 1      # does the program work?

What is measured and how: benchmarks/step_bench.py.
"""

from step_bench import main

if __name__ == "__main__":
    main("sd15", 512, __doc__)
