"""Find lottery tickets in BERT by masked language modelling on plain text, or train a given one.

python lt_pretrain.py                                  WikiText-103 from the hub, the paper's settings
python lt_pretrain.py --data-dir text/                 text/en.train and text/en.valid, plain UTF-8 of any size
python lt_pretrain.py --mask mask.safetensors          train that ticket once
"""

from bert_tickets.methods.main import main

if __name__ == "__main__":
    main("mlm", __doc__)
