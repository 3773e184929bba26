"""Find lottery tickets in BERT on SQuAD v1.1, or train a given one.

python lt_squad.py                             iterative magnitude pruning, the paper's settings
python lt_squad.py --mask mask.safetensors     train that ticket once
"""

from bert_tickets.methods.main import main

if __name__ == "__main__":
    main("squad", __doc__)
