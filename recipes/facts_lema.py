"""Facts about LEMA itself, about training memory, and about graphics cards.

The LEMA table has two lines a subject: ``question / other wording``, then ``answer | explanation``.
"""

from __future__ import annotations

from reply_facts import Confidence, Fact

LEMA_ROWS = """
What is LEMA? / What is LEMA in short?
    A way to train models larger than VRAM | It streams frozen layers to the GPU just before use.
Which layers does LEMA keep in VRAM? / How many layers does LEMA hold in VRAM at once?
    Only a few at a time | The others wait in RAM or on disk.
Which Trainer does LEMA need? / Which Trainer runs a model that LEMA has wrapped?
    The stock transformers Trainer | The model is wrapped, not the Trainer.
Which adapters does LEMA train? / What does LEMA train?
    Those of stock PEFT | LoRA adapters are saved as usual.
Does LEMA change the loss? / Is training with LEMA exact?
    No, the numbers stay the same | It only changes where the weights are.
Where does LEMA keep a model that fits in RAM? / What is the RAM tier of LEMA?
    In one page-locked area | All layers are copied from it to the GPU.
Where does LEMA keep a model too large for RAM? / What is the disk tier of LEMA?
    In its files on disk | Threads read layers into a small ring.
What is a slot in LEMA? / What is meant by a slot?
    A fixed buffer on the device | It holds the weights of one layer.
What is a lease in LEMA? / What is meant by a lease?
    A right to use a slot | The slot is not refilled while leased.
What is a resident layer in LEMA? / Which layer is called resident?
    One that stays in VRAM | It is never streamed.
What is a streamed layer in LEMA? / Which layer is called streamed?
    One that is copied in when needed | Its slot is used again by others.
What does prefetch mean in LEMA? / What is a prefetch?
    Loading a layer early | The copy hides behind the compute.
What is a demand load in LEMA? / What follows when a prefetch is late?
    A load that compute waits for | The layer was not there in time.
What is a boundary activation in LEMA? / What does LEMA keep of each layer?
    The input of a layer | The backward recomputes from it.
What does LEMA recompute in the backward? / What is computed twice in LEMA?
    The forward of each layer | So inner activations need no memory.
In which order does the backward visit layers? / Which layer comes first in the backward?
    From the last to the first | Gradients flow towards the input.
In which order does the forward visit layers? / Which layer comes first in the forward?
    From the first to the last | Each layer needs the one before.
How often does a step need each streamed layer? / How many times is a layer streamed per step?
    Twice | Once forward and once backward.
Do streamed weights travel back to the host? / Does LEMA copy base weights back to RAM?
    No | Frozen weights do not change.
Why is nothing streamed written back? / Why is LEMA's traffic only host to device?
    The base is frozen | Only the adapters are updated.
What does vram_budget set in LEMA? / What is vram_budget?
    A limit of VRAM | Spare room keeps layers resident.
What does ram_budget set in LEMA? / What is ram_budget?
    A limit of RAM for the layers | A larger model uses the disk tier.
What does vram_budget "min" mean? / What stays resident at vram_budget "min"?
    No layer stays resident | Only the slots hold layers.
What does num_slots set in LEMA? / What is num_slots?
    How many layer buffers there are | Two is usual.
What does get_streamer give? / What does get_streamer return?
    The runtime of a wrapped model | get_streamer gives stats and close.
What does LemaModelWrapper.unwrap do? / What does unwrap give?
    The plain model | unwrap undoes wrap.
Can LEMA run without a GPU? / Does LEMA work on a CPU?
    Yes | The same code runs without events.
When is stock PEFT faster than LEMA? / When should one not use LEMA?
    When the model fits in VRAM | Then nothing has to be moved.
What limits LEMA's forward? / What does LEMA's forward wait for?
    The bus | The forward has little arithmetic a byte.
What limits LEMA's backward? / What bounds the time of LEMA's backward?
    The arithmetic | It recomputes and takes gradients.
How can LEMA's copy cost be spread? / What makes streaming cheaper per token?
    More tokens a step | The bytes do not depend on the batch.
What is NF4 in QLoRA? / What is NF4?
    A 4-bit number format | Its levels follow a normal distribution.
What is LoRA? / What does LoRA train?
    A low-rank update of weights | Two thin matrices are trained.
What is QLoRA? / What does QLoRA stand on?
    LoRA on a 4-bit base | The frozen weights are quantized.
What is gradient checkpointing? / What saves the memory of activations?
    Recomputing activations | It trades time for memory.
What is gradient accumulation? / What lets a small card use a large batch?
    Summing gradients of small batches | The optimizer steps once for all.
What is page-locked memory? / What is pinned memory?
    RAM that cannot be swapped | A device may copy from it directly.
Why is pinned memory used for copies? / Why are copies from pinned memory better?
    They are faster, and asynchronous | Pinned pages stay where they are.
What is VRAM? / What is meant by VRAM?
    The memory of the GPU | Kernels read their data from it.
What does AdamW keep for each parameter? / Which state has AdamW for a parameter?
    Two moments | A mean and a mean square of gradients.
Why does fp16 need loss scaling? / What does GradScaler do?
    It lifts tiny gradients | fp16 would round them to zero.
Does bf16 need loss scaling? / Does bf16 need GradScaler?
    No, its range is wide | Its exponent is as wide as fp32's.
How many exponent bits has fp16? / How wide is the exponent of fp16?
    5 | 10 fraction bits and a sign remain.
How many exponent bits has bf16? / How wide is the exponent of bf16?
    8 | 7 fraction bits and a sign remain.
How many exponent bits has fp32? / How wide is the exponent of fp32?
    8 | 23 fraction bits and a sign remain.
What is the largest finite fp16 value? / Above which value does fp16 overflow?
    65,504 | It is (2 - 2^-10) x 2^15.
How many bytes has an fp32 number? / How large is fp32?
    4 | It has 32 bits.
How many bytes has an fp16 number? / How large is fp16?
    2 | It has 16 bits.
How many bytes has a bf16 number? / How large is bf16?
    2 | It has 16 bits.
How many bytes has an fp64 number? / How large is fp64?
    8 | It has 64 bits.
How many bytes is one GiB? / What is a gibibyte?
    2^30, or 1,073,741,824 | Gi is a binary prefix.
How many bytes is one GB? / What is a gigabyte?
    10^9 | G is a decimal prefix.
What is a safetensors file? / What is in a safetensors file?
    A header and raw tensors | It runs no code when read.
What is an epoch? / What is called an epoch?
    One pass over the data | Each example is seen once.
What is a learning rate? / What does the learning rate set?
    The size of the update | It multiplies the step.
What is an optimizer step? / What does an optimizer step do?
    It updates the weights | It follows the backward pass.
What is a tokenizer for? / What does a tokenizer do?
    It turns text into token ids | It also turns them back.
What does bandwidth mean? / What is bandwidth?
    Bytes moved a second | It is not the same as delay.
What is overfitting? / What is called overfitting?
    Learning the noise of the data | New data then shows a higher loss.
What does causal masking do? / What does a causal mask do?
    It hides later tokens | The mask makes training match use.
"""

# name, GiB on the card (0 where it was sold with several sizes), generation, compute capability
CARDS = """
Tesla P100,16,Pascal,6.0
Tesla P40,24,Pascal,6.1
GTX 1080,8,Pascal,6.1
GTX 1080 Ti,11,Pascal,6.1
GTX 1070,8,Pascal,6.1
GTX 1050 Ti,4,Pascal,6.1
Tesla V100,0,Volta,7.0
Tesla T4,16,Turing,7.5
RTX 2070,8,Turing,7.5
RTX 2080,8,Turing,7.5
RTX 2080 Ti,11,Turing,7.5
Titan RTX,24,Turing,7.5
GTX 1660,6,Turing,7.5
A100,0,Ampere,8.0
A30,24,Ampere,8.0
A10,24,Ampere,8.6
A40,48,Ampere,8.6
RTX A6000,48,Ampere,8.6
RTX 3070,8,Ampere,8.6
RTX 3080,0,Ampere,8.6
RTX 3090,24,Ampere,8.6
L4,24,Ada Lovelace,8.9
L40S,48,Ada Lovelace,8.9
RTX 4070,12,Ada Lovelace,8.9
RTX 4080,16,Ada Lovelace,8.9
RTX 4090,24,Ada Lovelace,8.9
H100,0,Hopper,9.0
H200,141,Hopper,9.0
RTX 5080,16,Blackwell,12.0
RTX 5090,32,Blackwell,12.0
"""


def lema_facts() -> list[Fact]:
    """What LEMA is and the words of training memory; every wording becomes an example."""
    facts = []
    lines = [line.strip() for line in LEMA_ROWS.strip().splitlines()]
    for questions, statement in zip(lines[0::2], lines[1::2], strict=True):
        answer, explanation = statement.split(" | ")
        wordings = tuple(questions.split(" / "))
        facts.append(
            Fact(key=f"lema:{wordings[0]}", topic="lema", questions=wordings, answer=answer, explanation=explanation)
        )
    return facts


def card_facts() -> list[Fact]:
    """Memory, generation, compute capability and bf16 arithmetic of each card; one key a card."""
    facts = []
    for row in CARDS.strip().splitlines():
        name, memory_gb, generation, capability = row.split(",")
        has_bf16 = float(capability) >= 8.0
        rows = [
            (
                f"Which generation of GPU is the {name}?",
                generation,
                f"Its compute capability is {capability}.",
            ),
            (
                f"What is the compute capability of the {name}?",
                capability,
                f"It is of the {generation} generation.",
            ),
            (
                f"Does the {name} compute in bf16?",
                "Yes" if has_bf16 else "No, fp16 is its half precision",
                f"bf16 needs capability 8.0; it has {capability}.",
            ),
        ]
        if memory_gb != "0":
            rows.append(
                (f"How much VRAM does the {name} have?", f"{memory_gb} GB", "It is the size given by its maker.")
            )
        for question, answer, explanation in rows:
            facts.append(
                Fact(
                    key=f"card:{name}",
                    topic="cards",
                    questions=(question,),
                    answer=answer,
                    explanation=explanation,
                    confidence=Confidence.HIGH,
                )
            )
    return facts
