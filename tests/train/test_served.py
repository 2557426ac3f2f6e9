"""What was trained is what is served: the trainer's log-probabilities are the engine's, and a task learned is done."""

import dataclasses

import api_server
import numpy as np
import pytest
import train_cases as cases
from conftest import ADAPTER_CONFIGS
from engine_runs import ATOL, ROOMY, request, serve

import preft_jax
from preft_jax import AdapterConfig
from preft_jax.adapters.edit_mask import extend_edit_mask, prompt_edit_mask
from preft_jax.text.chat import EncodedPrompt
from serve.engine.engine import Engine
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry
from train.data.documents import sampled_document
from train.data.rows import DataOptions, Example, make_examples
from train.trainer import Trainer

KINDS = "lora_pattern", "direft", "direft_free", "loreft_f3l2", "lora_all", "loreft_all"
"""Every fold and rule of positions once: a program over many kinds takes long to compile."""


def test_every_kind_is_served_as_it_was_trained(lively, adapters, tmp_path, rng):
    """Trained and published, or exported and loaded; served: then the trainer scores the engine's answers."""
    jobs = [
        cases.job(lively, ADAPTER_CONFIGS[name], cases.examples(ADAPTER_CONFIGS[name], rng, 4), name=name,
                  initial=adapters[name], max_steps=4, optimizer={"optim": "sgd", "learning_rate": 0.03})
        for name in KINDS
    ]  # fmt: skip
    trainer = Trainer(lively, jobs)
    for _ in range(3):
        trainer.step()
    store, requests = AdapterStore(AdapterFiles(lively), Registry(), host_bytes=10**8), []
    for i, job in enumerate(jobs):
        preft_jax.save_adapter(tmp_path / job.name, trainer.adapter_of(job))
        adapter = preft_jax.load_adapter(tmp_path / job.name, lively)
        published = store.publish(job.name, trainer.adapter_of(job))
        assert published.digest == adapter.digest
        requests.append(request(rng.integers(0, 250, 11), published if i % 2 else adapter, max_tokens=12))
    engine = Engine(lively, ROOMY, store=store)
    samples = serve(engine, [*requests, dataclasses.replace(requests[0], adapter=None)])
    store.close()
    moved, drawn = 0, {}
    for job, one, (sample,) in zip(jobs, requests, samples[:-1], strict=True):
        prompt = one.prompt.token_ids
        mask = extend_edit_mask(
            prompt_edit_mask(one.prompt, one.adapter.config), len(sample.token_ids), one.adapter.config.positions
        )
        scored = Example(
            np.asarray([*prompt, *sample.token_ids], np.int32), mask, np.arange(len(mask)) >= len(prompt),
            EncodedPrompt(prompt, ()), sample.token_ids, 1,
        )  # fmt: skip
        loss, count = trainer.evaluate(job, [scored])
        assert count == len(sample.token_ids)
        assert loss == pytest.approx(-np.mean(sample.logprobs), abs=ATOL)
        unedited = dataclasses.replace(scored, edit_mask=np.zeros_like(mask))
        moved += abs(trainer.evaluate(job, [unedited])[0] - loss) > 10 * ATOL
        drawn[job] = sampled_document(
            one.prompt, sample.token_ids, one.adapter.config, logprobs=sample.logprobs, advantage=2.0
        )
    assert moved == len(jobs), "every adapter does something"
    trainer.finish()
    trainer.forward_backward({job: [[document]] for job, document in drawn.items()}, "importance_sampling")
    trainer.optim_step()
    for result in trainer.finish().results:
        assert result.loss == pytest.approx(-2, abs=2 * ATOL), "what is learned is what was drawn"
        assert result.metrics["ratio"] == pytest.approx(1, abs=ATOL)


@pytest.fixture
def taught(lively):
    """Return an adapter that was taught to say every word twice, its words, and how they are asked."""
    config = AdapterConfig(rank=16)
    words = ["sun", "moon", "star", "sky"]
    data = [
        one
        for word in words
        for one in make_examples({"prompt": f"say {word} ", "completion": word * 2}, lively, config, DataOptions())
    ]
    job = cases.job(lively, config, data, max_steps=80, optimizer={"learning_rate": 1e-2})
    (adapter,), _ = (list(found.values()) for found in cases.train(lively, [job]))
    return adapter, words


def test_a_trained_adapter_does_its_task_through_the_server_and_the_base_does_not(lively, taught, tmp_path):
    adapter, words = taught
    preft_jax.save_adapter(tmp_path / "twice", adapter)
    serving = api_server.make_serving(lively, tmp_path)
    serving.adapters.register("twice", str(tmp_path / "twice"))
    with api_server.running(serving) as url, api_server.client(url, api_server.ALICE) as client:
        api_server.until(lambda: serving.engine.ready)

        def answer(model, word):
            found = client.completions.create(
                model=model, prompt=f"say {word} ", max_tokens=2 * len(word), temperature=0
            )
            return found.choices[0].text

        assert [answer("twice", word) for word in words] == [word * 2 for word in words]
        assert not any(answer("tiny", word) == word * 2 for word in words)
