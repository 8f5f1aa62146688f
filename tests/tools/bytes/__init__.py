"""Whether two source trees write the same bytes: ``python -m tests.tools.bytes BASE [OTHER]``.

``inputs`` makes what is read, ``scenarios`` says what is done with it, ``execution`` does it with
one tree's command line, ``comparison`` holds the files of two trees against each other, and
``allowances`` says what may differ.
"""
