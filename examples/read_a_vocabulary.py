"""What two tokenizers' vocabularies consist of: one for English alone, one for three scripts."""

import pydoc_data.topics

from jeton.text import supertokens, train_bpe
from jeton.text.qtok import Qtok

english = list(pydoc_data.topics.topics.values())[:80]
others = ["Съешь же ещё этих мягких французских булок, да выпей чаю.", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία."] * 50

print(Qtok().report({"english": train_bpe(english, 1500), "three scripts": train_bpe(english + others, 1500)}))

wide = supertokens(english, 3000)
sentence = "In the case of an error, the name of the function is printed."
print(f"\n{len(train_bpe(english, 3000).encode(sentence).ids)} tokens, with supertokens {len(wide.encode(sentence).ids)}:")
print([wide.decode([id]) for id in wide.encode(sentence).ids])
