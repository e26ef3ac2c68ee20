import os

# Threads that wait for one another sleep. GNU's OpenMP lets them spin, which on a busy machine
# leaves a quarter of the speed: 7.5 images/s against 32, on a quiet one 107 against 109 (ViT-Ti/16
# in bfloat16, two threads, load 4 on two cores). It is read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
