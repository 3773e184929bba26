"""Find lottery tickets in BERT on a GLUE task, or train a given one.

python lt_glue.py --task mnli                          iterative magnitude pruning, the paper's settings
python lt_glue.py --task rte --mask mask.safetensors   train that ticket once
"""

from bert_tickets.methods.main import main

if __name__ == "__main__":
    main("glue", __doc__)
